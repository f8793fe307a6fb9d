import sys

sys.exit("a plugin is no place for this")
