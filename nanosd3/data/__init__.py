"""Images and captions to train on.

Modules, each of which imports only from those above it:
    mnist          MNIST and datasets like it, with captions made from labels and measurements
    pictures       reading images, masks and arrays
    image_folder   a folder of images with captions
    buckets        aspect-ratio buckets: batches of one size from images of many
    sources        the interface of all training data: pixels and captions by index
"""
