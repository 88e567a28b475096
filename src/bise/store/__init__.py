"""What outlives a process: keys, limits, prices, the ledger, files and batch jobs. Knows nothing of HTTP."""
