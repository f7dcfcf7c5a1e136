"""Output for people: console lines, tables, plots, the HTML report and TensorBoard files."""
