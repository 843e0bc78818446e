"""What Engram is: compressed vocabulary, n-gram hash, multi-head table, and the module that reads them."""

from engram_interp.memory.compress import CompressedVocabulary as CompressedVocabulary
from engram_interp.memory.engram import Engram as Engram
from engram_interp.memory.engram import EngramOptions as EngramOptions
from engram_interp.memory.engram import EngramState as EngramState
from engram_interp.memory.engram import gate_of_score as gate_of_score
from engram_interp.memory.hashing import NgramHash as NgramHash
from engram_interp.memory.hashing import assign_primes as assign_primes
from engram_interp.memory.hashing import pcg64_multipliers as pcg64_multipliers
from engram_interp.memory.hashing import splitmix64_multipliers as splitmix64_multipliers
from engram_interp.memory.table import MultiHeadTable as MultiHeadTable
