"""What carries out a core's plans on devices: programs, executors, pools."""
