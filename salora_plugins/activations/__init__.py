"""What passes the layers of a model: capturing it, and the statistics that are kept of it."""
