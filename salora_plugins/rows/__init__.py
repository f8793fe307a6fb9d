"""
Rows of data, from where users keep them to batches.

`sources` gets rows from files, folders, the hub and objects; `formats` makes examples (`examples`) of rows of any usual
format; `reading` does both for a data set and says what is left out. `rendering` applies chat templates, `tokenizing`
marks the response among the token ids, `batching` pads. What is wrong with data is a `DataError` (`errors`).
"""
