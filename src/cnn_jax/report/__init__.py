"""What people look at: lines, tables and pictures."""
