"""
What passes the layers of a model, and the statistics that are kept of it.

`capture` runs a model over batches, `collector` hooks its layers, `positions` says which tokens count. What is kept of
a layer is in `statistics`, with the choice between exact and sketched; the mathematics of both is in `vectors`.
"""
