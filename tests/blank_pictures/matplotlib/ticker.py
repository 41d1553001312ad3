from . import Anything

LogLocator = MaxNLocator = NullFormatter = StrMethodFormatter = Anything
