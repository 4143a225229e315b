"""What tests share: a tiny official model, known weights, a run by several processes."""
