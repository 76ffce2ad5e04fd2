"""What was done and measured: data, tables, model card."""
