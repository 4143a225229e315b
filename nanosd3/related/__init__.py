"""Neighbours: systems that Stable Diffusion 3 grew from, or that grew beside it.

Each stands on the core's own pieces in one small file, is held against a reference, and trains
here in minutes, in the latents of a finished main job. Nothing outside this folder imports from it,
except the experiments in claims/.

Modules, each of which imports only from those above it:
"""
