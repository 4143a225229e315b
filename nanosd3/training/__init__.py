"""Training, from images and captions to a model that generates.

Modules, each of which imports only from those above it:
    grids_and_gifs      image grids with captions, and animations
    plot_style          colours and axes that all plots share
    plots               plots of runs and of benchmarks
    metrics             Frechet distance
    ema                 moving average of the weights
    muon                the optimizer of the transformer's matrices
    optimizer           which optimizer trains what, and the learning rate schedule
    not_finite          where in a step the first non-finite number arises
    loop                the training loop that all stages share
    throughput          training speed and memory, speed.jsonl
    stages              what a stage needs; train it once, then load it
    classifier          classifies images, for the metrics
    evaluation          scores of prompted samples: accuracy, Frechet distance, the frontier
    train_autoencoder   the autoencoder
    train_text          the text encoders: two CLIPs and a T5
    cached_features     latents and text features, encoded once and kept on disk
    encoders            the encoders, trained here or taken from another model
    train_flow          the transformer
    report              samples, metrics and pictures of a run
    scene_judge         finds and reads the digits of a scene, and names their colours
    geneval             nano GenEval and typography: do pictures follow their prompts?
    options             the command-line options, and the job they amount to
    train_scenes        the stages on scenes of coloured digits
"""
