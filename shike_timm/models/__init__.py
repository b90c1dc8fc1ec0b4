from .shike import Shike as Shike
