"""
A user's model.

`targets` finds the layers that an adapter goes on, `weights` reads a layer's weight however it is kept, `embeddings`
what the model tells of its tokens. `fingerprint` tells models apart, `running` puts one into the state in which it is
measured, and `loading` gets one as the options of a command name it.
"""
