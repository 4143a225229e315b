"""The book's drawings, by subject; canvas.py draws them, sizes.py computes the shapes they state.

overview      from the caption to the pixels
blocks        a joint block, the last one, adaLN-Zero
latents       the autoencoder; patches and positions
text          three encoders, one context
flow          the straight line, densities of the time, guidance
motion        what moves
"""
