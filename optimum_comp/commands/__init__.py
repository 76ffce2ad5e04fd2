"""`optimum-cli comp`: parse, call, print; nothing heavy is imported before a command runs."""
