"""The forward pass of a network of timm as a graph, and modules made of parts of the graph."""
import operator
from typing import Any, Dict, List, Optional, Sequence

import torch
from timm.models import get_notrace_functions
from torch import Tensor, fx, nn
from torch.fx.node import map_arg


class _Proxy(fx.Proxy):
    def __len__(self) -> int:
        value = self.node.meta['value']
        return super().__len__() if isinstance(value, Tensor) else len(value)


class Tracer(fx.Tracer):
    """Records which modules, functions and parameters a method of a network uses for a value on the meta device.

    A module with no feature level inside is recorded as one node. `node.meta['value']` is the value of a node.
    """

    def __init__(self, levels: Sequence[str], method: str, value: Tensor):
        super().__init__(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)
        self.traced_func_name = method
        self.levels = levels
        self.value = value
        self.running = False

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        return root_fn, [self.root, self.create_proxy('placeholder', 'x', (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(level.startswith(module_qualified_name + '.') for level in self.levels)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Dict[str, Any]) -> Any:
        if self.running:
            return attr_val
        if isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter):
            # A part takes its buffers, like its parameters, from the network that it is made from.
            names = [name for name, buffer in self.root.named_buffers() if buffer is attr_val]
            return self.create_proxy('get_attr', names[0], (), {}) if names else attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def record_method(self, path: str, module: nn.Module, method: str) -> None:
        """Record calls of a method of a module as one node, for networks that call the method and not the module."""
        own = getattr(module, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.running:
                return own(*args, **kwargs)
            return self.create_proxy(
                'call_method', method, (self.create_proxy('get_attr', path, (), {}), *args), kwargs)

        setattr(module, method, call)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        self.running = True
        try:
            value = self._run(node)
        finally:
            self.running = False
        node.meta.update(value=value, version=getattr(value, '_version', None))
        return node

    def _run(self, node: fx.Node) -> Any:
        args: Any = map_arg(node.args, lambda one: one.meta['value'])
        args = [list(one) if isinstance(one, list) else one for one in args]  # Lists of a node are immutable.
        kwargs: Any = map_arg(node.kwargs, lambda one: one.meta['value'])
        if node.op == 'placeholder':
            return self.value
        if node.op == 'get_attr':
            return operator.attrgetter(str(node.target))(self.root)
        if node.op == 'call_module':
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == 'call_method':
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs) if callable(node.target) else args[0]  # The last node is the output.

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Any:
        if isinstance(obj.node.meta['value'], Tensor):
            return super().iter(obj)
        return iter([obj[i] for i in range(len(obj))])


@torch.no_grad()
def trace(net: Any, levels: Sequence[str], method: str, value: Tensor) -> List[fx.Node]:
    """Trace a method of a network on the meta device: return its nodes in order, without asserts and unused sizes."""
    tracer = Tracer(levels, method, value)
    embeddings = [(path, module) for path, module in net.named_modules() if hasattr(module, 'get_embed')]
    for path, module in embeddings:  # These are rotary position embeddings.
        tracer.record_method(path, module, 'get_embed')
    try:
        graph = tracer.trace(net.eval())
    finally:
        for _, module in embeddings:
            del module.get_embed
    for node in reversed(list(graph.nodes)):
        if node.op == 'get_attr' and str(node.target).startswith('_tensor_constant'):
            raise fx.proxy.TraceError('it makes tensors of nothing that other networks have')
        sizes = isinstance(node.meta.get('value'), (int, torch.Size))
        if not node.users and (node.target is torch._assert or sizes and node.op != 'output'):
            graph.erase_node(node)
    return list(graph.nodes)


def is_overwritten(node: fx.Node) -> bool:
    """Whether a later node changed the value of this node in place."""
    return node.meta['version'] != getattr(node.meta['value'], '_version', None)


def _is_chain(nodes: Sequence[fx.Node], state: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> bool:
    last = [*state, *nodes]
    return len(state) == len(outputs) == 1 and last[-1] is outputs[0] and all(
        node.op == 'call_module' and node.args == (before,) and not node.kwargs
        for before, node in zip(last, nodes))


def make_part(
        net: nn.Module, nodes: Sequence[fx.Node], state: Sequence[fx.Node], outputs: Sequence[fx.Node],
        index: Optional[int] = None,
) -> nn.Module:
    """Make a module from some nodes of a network.

    It takes the values of the nodes `state` and returns the values of the nodes `outputs`: a tensor, or a tuple. If
    `index` is given, the first output is this element of its node's value. A chain of modules is an `nn.Sequential`.
    """
    if index is None and _is_chain(nodes, state, outputs):
        modules = []
        for module in (net.get_submodule(str(node.target)) for node in nodes):
            modules += list(module) if type(module) is nn.Sequential else [module]
        return nn.Sequential(*modules)
    graph = fx.Graph()
    given = graph.placeholder('state')
    several = len(state) > 1
    copies = {
        node: graph.call_function(operator.getitem, (given, i)) if several else given for i, node in enumerate(state)}
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda one: copies[one])
        copies[node].meta.clear()
    given = [copies[node] for node in outputs]
    if index is not None:
        given[0] = graph.call_function(operator.getitem, (given[0], index))
    graph.output(tuple(given) if len(given) > 1 else given[0])
    return fx.GraphModule(net, graph)
