"""How messages travel: the port and its plain types.

The implementations are imported from their modules, so that this package stays light:
``edge_ll.transport.mqtt.MqttTransport`` and ``edge_ll.transport.memory.MemoryTransport``.
"""

from edge_ll.transport.port import Delivery, Handler, Message, Transport, Will

__all__ = ["Delivery", "Handler", "Message", "Transport", "Will"]
