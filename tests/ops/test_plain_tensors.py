"""What no fused op can read or differentiate is refused by name, before a derivative is lost without a word."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import func

from fastkd.ops import attribution_distance, cos_nce, relation_kl, sparse_embedding
from fastkd.ops.cos_nce import eager_cos_nce
from fastkd.ops.sparse_arrays import Arrays
from fastkd.ops.sparse_embedding import embedding_block

STUDENT, TEACHER = torch.randn(4, 8), torch.randn(4, 8)
IDS = torch.tensor([[1, 9], [4, 5]])
CODE = Arrays(
    slot=torch.arange(10, dtype=torch.int32),
    kept=torch.randn(6, 8),
    kept_scale=None,
    atom_ids=torch.arange(8, dtype=torch.int32).reshape(4, 2) % 6,
    atom_weights=torch.randn(4, 2),
    weight_scale=None,
    residual=None,
    codebook=None,
)

OPS = {  # a function of one argument, its name, and a value
    "cos_nce": (lambda x: cos_nce(x, TEACHER), "student", STUDENT),
    "cos_nce's teacher": (lambda x: cos_nce(STUDENT, x), "teacher", TEACHER),
    "cos_nce's negatives": (lambda x: cos_nce(STUDENT, TEACHER, negatives=x), "negatives", TEACHER),
    "relation_kl": (lambda x: relation_kl(x[None], TEACHER[None], 2), "student", STUDENT),
    "relation_kl of a pair": (lambda x: relation_kl((TEACHER[None], x[None]), (x[None],) * 2, 2), "student", STUDENT),
    "sparse_embedding": (lambda x: sparse_embedding(IDS, CODE._replace(kept=x)).sum(), "kept", CODE.kept),
    "its weights": (lambda x: sparse_embedding(IDS, CODE._replace(atom_weights=x)).sum(), "atom_weights",
                    CODE.atom_weights),
    "embedding_block": (lambda x: embedding_block(IDS, CODE, x, torch.ones(8), torch.zeros(8)).sum(), "positions",
                        CODE.kept),
}  # fmt: skip
TRAINED = {name: OPS[name] for name in ("cos_nce", "relation_kl", "sparse_embedding")}


@pytest.fixture(params=OPS.values(), ids=OPS)
def op(request):
    return request.param


def dual(function, x, *, requires_grad=False):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x.clone().requires_grad_(requires_grad), x))


TANGENTS = {
    "jvp": lambda f, x: func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "vmap of jvp": lambda f, x: torch.vmap(lambda y: func.jvp(f, (y,), (y,))[1])(x[None]),
    "jvp of vmap": lambda f, x: func.jvp(torch.vmap(f), (x[None],), (x[None],)),
    "a dual tensor": dual,
}


@pytest.mark.parametrize("differentiate", TANGENTS.values(), ids=TANGENTS)
def test_forward_mode_is_refused_where_its_derivative_would_be_zero(op, differentiate):
    function, name, x = op
    with pytest.raises(RuntimeError, match=rf"{name} has a tangent.*no forward-mode derivative.*\.eager_\w+ \(plain"):
        differentiate(function, x)


def test_forward_mode_of_a_student_that_also_requires_a_gradient_is_refused_alike():
    with pytest.raises(RuntimeError, match="student has a tangent"):
        dual(lambda x: cos_nce(x, TEACHER), STUDENT, requires_grad=True)


REVERSED = {
    "grad": lambda f, x: func.grad(f)(x),
    "vjp": func.vjp,
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "grad of vmap": lambda f, x: func.grad(lambda y: torch.vmap(f)(y).sum())(x[None]),
}


@pytest.mark.parametrize("differentiate", REVERSED.values(), ids=REVERSED)
@pytest.mark.parametrize(("function", "name", "x"), TRAINED.values(), ids=TRAINED)
def test_a_first_derivative_by_torch_func_is_not_called_a_second(function, name, x, differentiate):
    message = rf"{name} is differentiated by torch\.func.*does not support; use loss\.backward\(\)"
    with pytest.raises(RuntimeError, match=message):
        differentiate(function, x)


@pytest.mark.parametrize(("function", "name", "x"), TRAINED.values(), ids=TRAINED)
def test_a_second_derivative_by_autograd_is_called_one(function, name, x):
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(function(leaf), leaf, create_graph=True)


@pytest.mark.parametrize("name", ["cos_nce", "relation_kl"])
def test_vmap_is_refused_by_name(name):
    function, argument, x = OPS[name]
    with pytest.raises(RuntimeError, match=rf"{argument} is batched by torch\.vmap, which {name} does not support"):
        torch.vmap(function)(x[None])


def test_vmap_of_a_lookup_is_a_lookup():
    torch.testing.assert_close(
        torch.vmap(lambda ids: sparse_embedding(ids, CODE))(IDS), sparse_embedding(IDS, CODE), rtol=0, atol=0
    )


@pytest.mark.parametrize(("function", "name", "x"), TRAINED.values(), ids=TRAINED)
def test_what_is_not_differentiated_may_stand_inside_a_transform(function, name, x):
    found = func.grad(lambda weight, y: weight * function(y))(torch.tensor(3.0), x)
    torch.testing.assert_close(found, function(x))


def test_the_eager_form_that_is_named_has_what_the_op_has_not():
    pairs = ~torch.eye(4, dtype=torch.bool)

    def loss(x):
        return eager_cos_nce(x, TEACHER, TEACHER, pairs).mean()

    _, tangent = func.jvp(loss, (STUDENT,), (TEACHER,))
    torch.testing.assert_close(tangent, (func.grad(loss)(STUDENT) * TEACHER).sum())


def test_a_sparse_layout_is_refused_by_name(op):
    function, name, x = op
    with pytest.raises(TypeError, match=rf"{name} has the layout torch\.sparse_coo; \w+ reads dense tensors: {name}"):
        function(x.to_sparse())


NESTED_IN = {
    "relation_kl": (lambda x: relation_kl(x, x, 2), "student"),
    "relation_kl of a pair": (lambda x: relation_kl((TEACHER[None], x), (x, x), 2), "student"),
    "cos_nce": (lambda x: cos_nce(x, x, tokens=True), "student"),
    "cos_nce's negatives": (lambda x: cos_nce(STUDENT, TEACHER, negatives=x), "negatives"),
    "attribution_distance": (lambda x: attribution_distance(x, None, STUDENT[None]), "gradient"),
    "sparse_embedding": (lambda x: sparse_embedding(x.long(), CODE), "ids"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("function", "name"), NESTED_IN.values(), ids=NESTED_IN)
def test_a_nested_tensor_is_refused_by_name(function, name):
    with pytest.raises(
        TypeError, match=rf"{name} is a nested tensor; \w+ reads dense tensors: {name}.to_padded_tensor"
    ):
        function(torch.nested.nested_tensor([STUDENT, STUDENT[:1]]))


def test_a_layout_without_strides_is_refused_by_name():
    with pytest.raises(TypeError, match=r"student has the layout torch\.sparse_csr; cos_nce reads dense tensors"):
        cos_nce(STUDENT.to_sparse_csr(), TEACHER)
