"""Images and captions to train on.

Modules, each of which imports only from those above it:
    class_names    what the classes of MNIST and data sets like it are called
    mnist          MNIST and data sets like it, with captions made from labels and measurements
    formats        which image files are read
    pictures       reading images, masks and arrays
    caption_files  the captions of a folder's images, by name
    image_folder   a folder of images with captions
    buckets        aspect-ratio buckets: batches of one size from images of many
    sources        the interface of all training data: pixels and captions by index
    scene_prompts  prompts for scenes of coloured digits, and whether an image satisfies them
    digit_cutouts  digits cut out of their images and scaled
    scenes         digits in colour, composed by caption
"""
