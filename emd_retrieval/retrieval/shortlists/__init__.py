"""First stages behind one small protocol: FAISS, a matrix, a ready table of candidates, Qdrant."""

from emd_retrieval.retrieval.shortlists.base import Shortlist
from emd_retrieval.retrieval.shortlists.faiss_index import FaissIndexShortlist
from emd_retrieval.retrieval.shortlists.qdrant import QdrantShortlist
from emd_retrieval.retrieval.shortlists.table import CandidateTable

__all__ = ["CandidateTable", "FaissIndexShortlist", "QdrantShortlist", "Shortlist"]
