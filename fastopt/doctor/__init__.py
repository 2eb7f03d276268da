"""`fastopt doctor`: what is installed, what will run and why, and what is broken. Each module looks at one area."""
