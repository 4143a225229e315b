"""Mistakes by which one call or object leaves something to the next in a process that lives long.
Tuples (file, old text, new text, what)."""

TOKENIZERS = "tokenizers.py"
PIPELINE, LAZY, SETTINGS = "pipeline.py", "lazy_modules.py", "torch_settings.py"
LOOP, FILES = "training/loop.py", "storage/files.py"
EXPERIMENT = "claims/experiment.py"
MAPPED, ARCHIVES = "storage/mapped.py", "official/archives.py"
CHECKER, CELLS = "exercises/grader/checker.py", "exercises/grader/notebook_cells.py"
STATEMENTS, RECORDING = "exercises/grader/statements.py", "exercises/grader/recording.py"
SANDBOX = "exercises/grader/sandbox.py"
WORKERS, FORKS = "exercises/grader/workers.py", "exercises/grader/fork_server.py"
ROPE, TILES = "related/axial_rope.py", "related/neighbourhood.py"
TENSORS, OWN_RUNS = "official/tensors.py", "official/own_runs.py"

FAULTS_ONE_PROCESS = [
    (TOKENIZERS, '"""The ids of one word."""\n        return list(', '"""The ids of one word."""\n'
     "        return (", "the cached ids of a word"),
    (TOKENIZERS, "return type(self), (self.pieces, self.lower_case)",
     "return type(self), (self.pieces,)", "a copy keeps capitals"),
    (TENSORS, "        tensor.parts.clear()\n", "        tensor.parts.copy()\n",
     "two networks of one opened file"),
    (OWN_RUNS, "read=tensor.clone)", "read=tensor.detach)", "two networks of a run in training"),
    # what the caller has set
    (SETTINGS, "            stack.enter_context(torch.no_grad())\n", "",
     "gradients on where they were off"),
    (SETTINGS, "            stack.callback(torch.set_default_dtype, dtype)\n", "",
     "the caller's dtype is gone"),
    (SETTINGS, 'if torch.get_default_device().type != "cpu":', "if False:", "the caller's device"),
    (LAZY, "            with usual_settings():\n", "            if name in self.makers:\n",
     "networks of inference mode"),
    (PIPELINE, "    @usual_settings()\n    def noise(", "    def noise(", "noise of another type"),
    (PIPELINE, "    @torch.no_grad()\n    @usual_settings()\n    def __call__(",
     "    @torch.no_grad()\n    def __call__(", "an image by the caller's settings"),
    (PIPELINE, "    @usual_settings()\n    def decode(", "    def decode(", "a decoder elsewhere"),
    (FILES, "with usual_settings(), torch.random.fork_rng(devices=[]):",
     "with usual_settings():", "the caller's random numbers for initial weights"),
    (FILES, "with usual_settings(), torch.random.fork_rng(devices=[]):",
     "with torch.random.fork_rng(devices=[]):", "modules of inference mode"),
    ("train.py", "@usual_settings()\n", "", "training in the caller's type"),
    (ROPE, "@usual_settings()  # cached: later calls may train\n", "", "angles of inference mode"),
    (TILES, "@usual_settings()  # cached: later calls may train\n", "", "tiles of inference mode"),
    # what the caller does with what it gets, and what it did before
    (PIPELINE, "t.clone(), z.clone(), x0.clone()", "t.clone(), z.clone(), x0",
     "a callback changes the last estimate"),
    (PIPELINE, "t.clone(), z.clone(), x0.clone()", "t.clone(), z, x0.clone()",
     "a callback changes the noise of inpainting"),
    (PIPELINE, "t.clone(), z.clone(), x0.clone()", "t, z.clone(), x0.clone()",
     "a callback changes the times of later images"),
    (PIPELINE, "        with bar:  #", "        if True:  #", "a bar stays open after an error"),
    (LOOP, "    module.zero_grad()  # gradients of whatever the caller did before\n", "",
     "gradients left by an interruption"),
    (LAZY, "        try:\n            yield\n        finally:\n            self.release(name)",
     "        yield\n        self.release(name)", "a network stays after an error"),
    ("text.py", "        with self.parts.using(name):\n", "        if name in self.parts:\n",
     "an encoder stays"),
    (PIPELINE, '        with self.parts.using("vae"):\n            return',
     "        if latents is not None:\n            return", "the decoder stays"),
    (PIPELINE, '        with self.parts.using("mmdit"):\n', "        if text:\n",
     "the transformer stays"),
    # exercises and claims
    (CHECKER, "@torch.random.fork_rng(devices=[])\n", "", "an answer seeds the notebook"),
    (WORKERS, "self.kill_process()  #", "pass  #", "a process without a group is not stopped"),
    (WORKERS, "self.failed = True", "self.failed = False", "a late reply is that of another"),
    (WORKERS, "            if self.failed:\n", "            if False:\n",
     "a late reply is that of another thread"),
    (WORKERS, "self.is_own() and not self.failed and", "self.is_own() and",
     "a server that failed is kept"),
    (WORKERS, " and self.process.poll() is None", "", "a server that ended is kept"),
    (WORKERS, "return self.is_own() and not", "return not", "another process's server"),
    (WORKERS, "        if self.is_own():\n", "        if self.process:\n",
     "a fork ends the server of the process it was"),
    (FORKS, "        os.chdir(folder)\n", "", "files of an answer elsewhere"),
    (FORKS, '["MPLCONFIGDIR"] = tempfile.tempdir = folder', '["MPLCONFIGDIR"] = folder',
     "temporary files elsewhere"),
    (FORKS, "            os.dup2(null, stream)\n", "            os.dup2(null, 2)\n",
     "answers read the requests"),
    (STATEMENTS, "*before[-1:], *in_time[-1:]", "*in_time[-1:]", "a name bound in two steps"),
    (STATEMENTS, "return found + [s for s in changing if s.cell <= user.cell and s is not user]",
     "return found", "what changes an object that an answer uses"),
    (RECORDING, "    threading.settrace(count)\n", "", "threads take any number of lines"),
    (RECORDING, "first=not values", "first=True", "an answer that refuses input looks like a stub"),
    (SANDBOX, "            if not isinstance(error, Exception):  #", "            if True:  #",
     "an error takes the answers after it"),
    (FORKS, "except OSError as error:  #", "except KeyError as error:  #",
     "a server that the system refuses a process ends"),
    ("exercises/__main__.py", "        if not rows[file].is_graded:\n", "        if False:\n",
     "a file that could not be graded beside others"),
    ("exercises/__main__.py", "return 1 if missing else 0", "return 0",
     "files without a grade, and success"),
    (CELLS, "with _lock, warnings.", "with warnings.", "threads parse at the same time"),
    (EXPERIMENT, " or kept[key][0] != content", "", "results of a run that is gone"),
    (EXPERIMENT, "if key not in kept or", "if not kept or", "results of other conditions"),
    # files that change, and threads
    (MAPPED, "            parts.check(path, os.fstat(content.fileno()))\n", "",
     "tensors of a file that has replaced another"),
    (ARCHIVES, "            archive.parts.check(path, os.fstat(file.fileno()))\n", "",
     "the same of a checkpoint"),
    (MAPPED, "        self.file = now\n", "        self.file = None\n", "any file will do"),
    (MAPPED, "except FileNotFoundError:", "except KeyError:", "no memory for a file that is gone"),
    (FILES, "-{threading.get_ident()}", "", "threads write one file"),
]  # fmt: skip
