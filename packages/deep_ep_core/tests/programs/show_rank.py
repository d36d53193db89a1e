"""Prints this rank's environment and arguments as a JSON line, a line on standard error, and a line without an end."""

import json
import os
import sys

print(json.dumps({"environment": dict(os.environ), "arguments": sys.argv[1:]}))
print("on standard error", file=sys.stderr)
print("last words", end="")
