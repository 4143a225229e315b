"""Mistakes in reading what is given: files, folders, arrays and options. Tuples (file, old text,
new text, what)."""

FOLDERS = "official/folders.py"

FAULTS_GIVEN = [
    (FOLDERS, "[whole.name] if whole.is_dir() else [whole.name, whole.parent.name]",
     "whole.parts", "any folder above says turbo"),
    (FOLDERS, "[whole.name] if whole.is_dir() else", "", "the folder around a folder"),
    (FOLDERS, "(path.absolute(), path.resolve())", "(path.absolute(),)", "links are not followed"),
]  # fmt: skip
