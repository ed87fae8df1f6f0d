"""What shows a project's runs in the terminal, and what is wrong with its set-up."""
