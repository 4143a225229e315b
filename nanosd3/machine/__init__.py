"""Hardware and processes.

Modules, each of which imports only from those above it:
    device        device, threads, memory
    signals       Ctrl-C and SIGTERM
    matmul        matrix products through the faster library
    channels_last  the autoencoder in the layout that is faster for convolutions
    accelerate    faster drop-in layers that save less; checkpointing and torch.compile
    distributed   process group, DDP, FSDP2, mixed precision
"""
