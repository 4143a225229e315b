"""Mistakes by which one call or object leaves something to the next in a process that lives long.
Tuples (file, old text, new text, what)."""

TOKENIZERS = "tokenizers.py"
TENSORS, OWN_RUNS = "official/tensors.py", "official/own_runs.py"

FAULTS_ONE_PROCESS = [
    (TOKENIZERS, '"""The ids of one word."""\n        return list(', '"""The ids of one word."""\n'
     "        return (", "the cached ids of a word"),
    (TOKENIZERS, "return type(self), (self.pieces, self.lower_case)",
     "return type(self), (self.pieces,)", "a copy keeps capitals"),
    (TENSORS, "        tensor.parts.clear()\n", "        tensor.parts.copy()\n",
     "two networks of one opened file"),
    (OWN_RUNS, "read=tensor.clone)", "read=tensor.detach)", "two networks of a run in training"),
]  # fmt: skip
