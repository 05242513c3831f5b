"""Do the cuts help? Histories, tables and pictures of how near the predicted gradients come to what
they predict.
"""

from .diagnosis import Diagnosis as Diagnosis
from .diagnosis import summarize as summarize
from .figures import METRICS as METRICS
from .figures import ScalarWriter as ScalarWriter
from .figures import plot as plot
from .figures import plot_runs as plot_runs
from .figures import write_tensorboard as write_tensorboard
from .history import History as History
