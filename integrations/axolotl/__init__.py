"""`adapter: salora` in Axolotl (>= 0.21), found through the entry-point group `axolotl.plugins`."""
