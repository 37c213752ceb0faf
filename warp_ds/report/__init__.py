"""What people forward: certificates, tables, plots, plans."""
