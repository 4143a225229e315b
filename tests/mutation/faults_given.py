"""Mistakes in reading what is given: files, folders, arrays and options. Tuples (file, old text,
new text, what)."""

FOLDERS, RUN, USER_FILES = "official/folders.py", "storage/run.py", "storage/user_files.py"
FIND_PARTS = "official/find_parts.py"
CHECKER = "exercises/grader/checker.py"
MNIST, CLASSES = "data/mnist.py", "data/class_names.py"
PICTURES = "data/pictures.py"
RATES = "training/throughput.py"
TENSORS = "official/tensors.py"
DEVICE = "machine/device.py"
LOOP, NOT_FINITE = "training/loop.py", "training/not_finite.py"

FAULTS_GIVEN = [
    (FOLDERS, "[whole.name] if whole.is_dir() else [whole.name, whole.parent.name]",
     "whole.parts", "any folder above says turbo"),
    (FOLDERS, "[whole.name] if whole.is_dir() else", "", "the folder around a folder"),
    (FOLDERS, "(path.absolute(), path.resolve())", "(path.absolute(),)", "links are not followed"),
    (RUN, "any(not path.name.startswith(\".\") for", "any(path.name for",
     "hidden files are in the way"),
    (USER_FILES, "list(io.StringIO(read_text(path), newline=None))",
     "read_text(path).splitlines()", "U+2028 ends a line"),
    (USER_FILES, "newline=None", 'newline="\\n"', "a line of a Mac's end"),
    (MNIST, "((x.float() + 1) * 127.5)", "((x + 1) * 127.5)", "pixels rounded to bfloat16"),
    (CLASSES, "line.lower().strip()", "line.strip()", "names in capitals"),
    # a step that is not finite
    (LOOP, "min(PATIENCE, recipe.steps)", "PATIENCE", "short runs end without a loss"),
    (LOOP, "in microbatches(parallel, name, recipe.batch)]",
     "in microbatches(parallel, name, recipe.batch)[:1]]", "one microbatch runs again"),
    (NOT_FINITE, "[*weights, *outputs, *losses,", "[*outputs, *weights, *losses,",
     "what weights do to outputs is said"),
    (PICTURES, "array.astype(array.dtype.newbyteorder(\"=\"))", "array.copy()",
     "arrays of another machine's byte order"),
    (PICTURES, "except TypeError:", "except KeyError:", "arrays of texts"),
    (FOLDERS, 'return not known or ".index." in path.name', "return not known",
     "an index without its shards"),
    (FOLDERS, " if not path.is_dir()}", "}", "empty folders are weights"),
    (FOLDERS, "or path.stem in TEXT_NAMES", "", "a licence is weights"),
    (FIND_PARTS, "if name in file.lower() or", "if name in file or", "T5 in capitals"),
    (FIND_PARTS, "or subfolder in Path(file.lower()).parts[:-1]", "", "folders in capitals"),
    ("official/checkpoint.py", "not torch.equal(some_values(ours), some_values(theirs))", "False",
     "two embeddings of T5"),
    (CHECKER, "len(shared) == len(results) - 1 and", "False and", "another epsilon"),
    ("cli.py", "if number > largest:", "if False:", "numbers of any size"),
    ("cli.py", "return positive(text, MOST_IMAGES)", "return positive(text)", "any count"),
    (DEVICE, "if threads > MAX_THREADS:", "if False:", "more threads than a system gives"),
    (DEVICE, "1 <= number <= MAX_THREADS", "1 <= number", "the same of the environment"),
    (DEVICE, "n.isdecimal() and len(n) < 10 for n", "n.isdecimal() for n", "a rank of any length"),
    ("arguments.py", "if value is np.ma.masked:", "if False:", "a masked number is 0"),
    ("arguments.py", "    values = scalar(values)  # 0-d", "    pass  # 0-d",
     "an array of one text is its characters"),
    ("request.py", "    if count > MAX_STEPS:\n", "    if False:\n", "any number of steps"),
    ("request.py", "noise.float() if noise.dtype.itemsize == 1 else noise", "noise",
     "noise in 8 bits"),
    ("arguments.py", "if tensor.is_meta or tensor.layout != torch.strided:", "if tensor.is_meta:",
     "sparse tensors"),
    ("arguments.py", "    check_dense(name, value)\n", "", "latents that hold no numbers"),
    (PICTURES, "        check_dense(name, array)\n", "", "noise that holds no numbers"),
    (PICTURES, "if isinstance(array, np.ma.MaskedArray):", "if False:", "masks are ignored"),
    ("pipeline.py", " and kind.itemsize > 1", "", "computing in 8 bits"),
    ("weights.py", 'truth_value("staged", staged)', "staged", "staged='no' is staged"),
    ("generate.py", "if name not in read and getattr(args, name) != usual:",
     "if getattr(args, name) != usual:", "no report at all"),
    ("generate.py", "        check_report(args)\n", "", "options of a report without effect"),
    # rates of training
    (RATES, "{model}\\b", "{model}", "an L40S is an L40"),
    (RATES, "multiplication_speed(device, torch.bfloat16)",
     "multiplication_speed(device, torch.float32)", "a GPU's peak in float32"),
    (RATES, "        self.begin = None\n", "", "what is between steps counts"),
    (RATES, "        if self.begin is None:\n", "        if True:\n", "only the last microbatch"),
    # fingerprints, memory
    (TENSORS, "if len(tensor.shape) == 1 or not earlier:", "if len(tensor.shape) == 1:",
     "a merged LoRA is not noticed"),
    (TENSORS, "not like.startswith(SAMPLED)", "like.startswith(SAMPLED)", "versions exchanged"),
    (TENSORS, "like is not None and not", "not like or not", "new runs without matrices"),
    (TENSORS, "max(1, len(values) // MATRIX_VALUES)", "len(values)", "one value of a matrix"),
    (DEVICE, "group_memory()) / processes", "group_memory())", "each process has all of the RAM"),
    (DEVICE, "    torch.cuda.set_device(device)\n", "", "all processes ask for the first GPU"),
    (DEVICE, "return torch.zeros(1, device=device).item() == 0",
     "return torch.zeros(1, device=device).ndim == 1", "meta is a device to compute on"),
    # refused early
    (MNIST, "if len(images) < 2:", "if len(images) < 1:", "a single image"),
    ("bench.py", "    if args.against:\n        require_diffusers()\n", "",
     "a missing library is noticed late"),
    ("training/train_scenes.py", "if args.no_turbo:", "if False:", "scenes without turbo"),
]  # fmt: skip
