"""Files on disk, written atomically.

Modules, each of which imports only from those above it:
    files            atomic writes, JSON, safetensors, checksums
    user_files       files that users wrote: text from any editor, or a line that says what is wrong
    mapped           safetensors files of any size, mapped tensor by tensor
    run              the folder of a training run
    training_state   saved states of an unfinished stage, by one process or many
    shards           encoded images and captions, memory-mapped
"""
