"""Mistakes around training: what is kept, deleted, read, checked, and how much at once."""

CACHED, TEXT, FLOW_FILE = (
    f"training/{name}.py" for name in ("cached_features", "train_text", "train_flow")
)
STATE, FILES, CHECK = "storage/training_state.py", "storage/files.py", "measure/memory_check.py"
UNIGRAM, LAZY, RUNS = "unigram_training.py", "lazy_modules.py", "official/own_runs.py"
AUTOENCODER, KEYS = "training/train_autoencoder.py", "official/missing_keys.py"

FAULTS_TRAINING = [
    # weights to start from
    (KEYS, "        *(f\"{name} of this size has no {key}\" for key in comparison.beyond),\n", "",
     "what another network has besides is ignored"),
    (RUNS, "width, grid, config.mmdit.grid_sample, config.mmdit.grid_span",
     "width, grid, config.mmdit.grid_span, config.mmdit.grid_sample", "other positions"),
    # saved states
    (STATE, "        if out_of_memory(error):\n            raise\n", "",
     "out of memory: delete the state"),
    (STATE, "    except OSError as error:\n        raise unreadable(path, error) from None\n"
     "    except Exception as error:", "    except Exception as error:",
     "a failing disk: delete the state"),
    (FILES, "errno.EPERM, errno.EIO,", "errno.EPERM,", "a failing disk: the state before is used"),
    # the cache
    (CACHED, "    job.run.finish(\"samples\", {})\n    features.forget()\n",
     "    features.forget()\n    job.run.finish(\"samples\", {})\n", "deleted, then finished"),
    (CACHED, "        self.text_rows.close()\n", "", "deleted while it is mapped"),
    (FILES, "    except OSError as error:\n        reason = error.strerror or error\n",
     "    except ZeroDivisionError as error:\n        reason = error\n",
     "a file in use ends the job"),
    (CACHED, "    @cached_property\n    def opened", "    @property\n    def opened",
     "opened for each preview"),
    (CACHED, ", \"vae\": lambda: encoders.vae}", "}", "the autoencoder read for each preview"),
    (CACHED, "        pipeline.parts.free(name)\n", "        pass\n", "T5 beside the autoencoder"),
    (CACHED, "min(SHARD, max(1, SHARD_BYTES // row_bytes))", "SHARD", "shards of gigabytes"),
    (CACHED, "min(SHARD, max(1, SHARD_BYTES // row_bytes))", "min(SHARD, SHARD_BYTES // row_bytes)",
     "no row fits"),
    (CACHED, "return 4 * (tokens", "return (tokens", "numbers, not bytes"),
    (CACHED, "return 2 * 2 * config.vae", "return 2 * config.vae", "no deviations"),
    (CACHED, "on_cpu = [(a.cpu(), b.cpu()) for a, b in parts]",
     "on_cpu = [(a.cpu(), b.cpu()) for a, b in list(parts)]", "all on the device at once"),
    # tokenizers
    (TEXT, "job.group.is_main and not path.exists()", "not path.exists()", "trained by every rank"),
    (TEXT, "job.group.is_main and not path.exists()", "job.group.is_main",
     "trained at every start"),
    (UNIGRAM, "        if not 0.5 <= m[i] < 1:\n", "        if not m[i] < 1:\n",
     "long words underflow"),
    (UNIGRAM, "            e[j] = e[i]\n", "            e[j] = 0\n", "exponents are lost"),
    (UNIGRAM, "min(i + LONGEST, len(word)) + 1", "len(word) + 1", "pieces of any length"),
    (UNIGRAM, "e[i] + f[L - j] - e[L]", "e[i] + f[L - j]", "not relative to the whole word"),
    # how much at once
    (FLOW_FILE, "min(VALIDATION_BATCH, latents_at_once(", "max(VALIDATION_BATCH, latents_at_once(",
     "fifty images whatever their size"),
    (FLOW_FILE, "torch.bfloat16 if job.group.mode == \"fsdp\" and", "torch.bfloat16 if",
     "every network is rounded after training on a GPU"),
    (AUTOENCODER, "        noise = step_rng.take(noise).to(job.device)\n",
     "        noise = noise[: len(mean)].to(job.device)\n", "all parts of a batch have one noise"),
    (CHECK, "if batch % rows == 0)", "if rows)", "parts that are no part of the batch"),
    (CHECK, "        if (storage := tensor.untyped_storage()._cdata) not in weights:\n",
     "        if (storage := tensor.untyped_storage()._cdata):\n", "weights are counted twice"),
    (CHECK, "need, (available, where) = weights + autoencoder_rows(config) * held,",
     "need, (available, where) = weights,", "activations are free"),
]  # fmt: skip
