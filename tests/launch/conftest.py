import pathlib
import sys

# launch/ is not a package: its programs find their own modules beside themselves.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "launch"))
