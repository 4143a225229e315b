"""Reading and writing Stable Diffusion 3 checkpoints.

Modules, each of which imports only from those above it:
    tensors         tensors that are read from disk on demand
    pickles         pickles, followed without running them
    archives        PyTorch checkpoints, opened without loading them
    tensor_files    safetensors and .ckpt files, shards with an index
    folders         weights in a folder: whole or in shards, any variant
    key_names       the table of official and diffusers names
    detect          which model it is, and every size, from the tensors' shapes
    find_parts      the components in a file or folder, whatever their prefix
    folder_settings what a diffusers folder says that shapes do not
    limits          configs and tokenizers from a file, held to sizes that exist
    own_runs        a training run of this project: config, tokenizers, weights
    checkpoint      a file or folder of weights: components, config, tokenizers
    missing_keys    missing, unexpected and misshapen tensors
    load_networks   the networks of a checkpoint, read when first needed
    tokenizer_files tokenizers in transformers' formats
    export          writes single files and diffusers folders
"""
