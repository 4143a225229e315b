"""What the model costs in parameters, FLOPs, memory and time: predicted and measured.

Modules, each of which imports only from those above it:
    costs               parameters and FLOPs, in closed form
    activation_memory   what a training step holds at its peak, in closed form
    training_memory     memory of each process in training, in closed form
    memory_check        refuses training that needs more memory than there is
    random_models       randomly initialised networks and random inputs
    meters              FLOPs, peak memory, and the training step they are measured on
    compare_diffusers   time and memory next to diffusers, on the same weights
    generate_memory     peak memory of a whole run of `generate`
    growth              measured and predicted cost against depth, image tokens and batch
    cuda                every GPU measurement in one command (imports from training)
"""
