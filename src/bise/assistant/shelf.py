"""What one storage holds of the assistant: the platform's database, or memory for temporary chats."""

from __future__ import annotations

from bise.assistant.conversations import Conversations
from bise.assistant.documents import Documents
from bise.assistant.messages import Messages
from bise.assistant.storage import Storage


class Shelf:
    """Conversations, messages and documents of one storage."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.conversations = Conversations(storage)
        self.messages = Messages(storage)
        self.documents = Documents(storage)
