"""Reading and writing Stable Diffusion 3 checkpoints.

Modules, each of which imports only from those above it:
    tensors         tensors that are read from disk on demand
    pickles         pickles, parsed without executing them
    archives        PyTorch checkpoints, opened without loading them
    tensor_files    safetensors and .ckpt files, shards with an index
    folders         weights in a folder: whole or in shards, any variant
    key_names       the table of official and diffusers names
    detect          which model it is, and every size, from the tensors' shapes
    find_parts      the components in a file or folder, whatever their prefix
    folder_settings settings of a diffusers folder that shapes do not reveal
    limits          configs and tokenizers from a file, checked for plausible sizes
    own_runs        a training run of this project: config, tokenizers, weights
    checkpoint      a file or folder of weights: components, config, tokenizers
    missing_keys    missing, unexpected and misshapen tensors
    load_networks   the networks of a checkpoint, read when first needed
    tokenizer_files tokenizers in transformers' formats
    export          writes single files and diffusers folders

From a weight file to networks (`python -m nanosd3.generate PROMPT --model PATH`), one line per hop:
    generate        `open_checkpoint`, then `open_pipeline`, which calls `open_networks`
    checkpoint      a single file or a diffusers folder? (A run is opened by own_runs.)
    find_parts      which tensors belong to which component, by their prefixes or subfolders
    folders         which files of a folder: variant, shards, index
    tensor_files    name, shape and dtype of each tensor, from headers (archives for .ckpt)
    storage/mapped  where each tensor is in its file; `read` maps it, later
    key_names       diffusers' names to ours, as `from_diffusers` converts a component
    detect          the config, from shapes
    missing_keys    `check` compares names and shapes with the config's; wrong ones are refused
    load_networks   a reader for each network, called when it is first needed
    tensors         `fill` reads one tensor after another into an empty module
    components      `on_meta` builds that module: names and shapes, no memory
"""
