"""
What each of the three ideas costs and buys, measured on this machine. README.md is the report;
`python -m assessment` lists the commands behind it. The scripts of the root import nothing from
here.
"""
