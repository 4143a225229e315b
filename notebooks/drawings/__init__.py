"""The book's drawings, by subject; canvas.py is what they are drawn with, sizes.py what they say.

overview      from the caption to the pixels
blocks        a joint block, the last one, adaLN-Zero
latents       the autoencoder; patches and positions
text          three encoders, one context
flow          the straight line, densities of the time, guidance
motion        what moves
"""
