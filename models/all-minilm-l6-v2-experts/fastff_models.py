# The classes of this model, for trust_remote_code=True; `import fastff.models` does the same.
from fastff.models.converted import *
