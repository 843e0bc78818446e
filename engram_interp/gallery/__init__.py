"""Which sentences do the probes read when nobody brings a text? Encyclopedic English with names and set phrases.

Written for this project: each sentence states a well-known fact. `entity` spans are names of two or more words, so
that their last token is preceded by the rest of the name; `phrase` spans are set phrases of two or more words.
Sentences of the category `control` name no multi-word entity.
Misleads when: a model's training text lacks a name (the names occur in an English encyclopedia, but some are rare),
or when `control` sentences are taken as free of every memorised n-gram: they hold set phrases too.
"""

from engram_interp.gallery.positions import entity_final_positions as entity_final_positions
from engram_interp.gallery.sentences import GallerySentence as GallerySentence
from engram_interp.gallery.sentences import Span as Span
from engram_interp.gallery.sentences import load_gallery as load_gallery
from engram_interp.gallery.sentences import parse_gallery as parse_gallery
