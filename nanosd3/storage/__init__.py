"""Files on disk, written atomically.

Modules, each of which imports only from those above it:
    files            atomic writes, JSON, safetensors, checksums
    run              the folder of a training run
    training_state   saved states of an unfinished stage, by one process or many
    shards           encoded images and captions, memory-mapped
"""
