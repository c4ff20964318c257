"""What every room may use: files of others, the machine, the process."""
