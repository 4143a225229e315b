"""What it costs, measured: time, memory and exactness, on the machine at hand."""
