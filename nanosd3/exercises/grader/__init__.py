"""Checking and grading answers to the exercises.

Modules, each of which imports only from those above it:
    exercise        an exercise, its test cases and common wrong answers
    recording       calls answers and records the results
    sandbox         the restricted process in which files of answers run
    comparison      compares results and says in what way they differ
    checker         judges recorded results and says what is wrong
    notebook_cells  reads the cells of notebooks
    statements      which statements of a notebook an answer needs
    predictions     finds the predictions in a notebook
    hand_ins        reads files of answers, Python and notebooks
    fork_server     has torch loaded and forks the processes that run answers
    workers         starts these processes
    grading         grades whole files
    gradebook       the grades of a class
    progress        what is done in a folder of notebooks
    student_tests   `pytest --student=FILE`
"""
