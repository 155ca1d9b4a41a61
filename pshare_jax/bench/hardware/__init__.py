"""`bench hardware`: what one accelerator does, by one command of minutes that installs nothing."""
