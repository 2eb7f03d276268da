// What fastopt/engine/cohorts/look.py asks of every tensor in every step, without a Python call for each.

#include <torch/csrc/autograd/python_variable.h>

namespace {

enum Found { SAME = 0, MOVED = 1, OTHER = 2 };

// Sizes and strides of a tensor with gaps, as one number.
int64_t digest_of(const c10::TensorImpl& x) {
  uint64_t digest = 1469598103934665603ull;
  auto mix = [&digest](uint64_t value) { digest = (digest ^ value) * 1099511628211ull; };
  for (auto size : x.sizes()) mix(static_cast<uint64_t>(size));
  for (auto stride : x.strides()) mix(static_cast<uint64_t>(stride));
  return static_cast<int64_t>(digest);
}

// What a kernel takes for granted about a tensor: its dtype, and sizes and strides. Without gaps only the number of
// elements counts.
int64_t kind_of(const c10::TensorImpl& x) {
  const auto dtype = static_cast<uint64_t>(c10::typeMetaToScalarType(x.dtype()));
  const auto kind = static_cast<int64_t>((static_cast<uint64_t>(x.numel()) << 8 | dtype) << 2 | 1);
  return x.is_contiguous() ? kind : (kind ^ digest_of(x)) << 2 | 3;
}

// The address of an ordinary strided tensor, without the checks that asking the tensor itself makes.
int64_t address_of(const c10::TensorImpl& x) {
  if (x.numel() == 0) return 0;
  const auto start = reinterpret_cast<int64_t>(x.unsafe_storage().data());
  return start + x.storage_offset() * static_cast<int64_t>(x.itemsize());
}

bool is_ordinary(const at::Tensor& x) {
  static constexpr auto odd = c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::Negative, c10::DispatchKey::Conjugate, c10::DispatchKey::Functionalize});
  return x.defined() && !x.key_set().has_any(odd) && x.layout() == at::kStrided && x.has_storage();
}

Found look(const at::Tensor& x, int64_t& address, int64_t& kind) {
  const bool ordinary = is_ordinary(x);
  const int64_t kind_now = ordinary ? kind_of(*x.unsafeGetTensorImpl()) : 0;
  const int64_t address_now = ordinary ? address_of(*x.unsafeGetTensorImpl()) : 0;
  const Found found = !kind_now || kind_now != kind ? OTHER : address_now != address ? MOVED : SAME;
  address = address_now;
  kind = kind_now;
  return found;
}

// The gradient as it is there: `Tensor::grad` also asks whether to warn of a tensor that is no leaf.
const at::Tensor& grad_of(const at::Tensor& x) { return x.unsafeGetTensorImpl()->grad(); }

// Tensors that are looked at together. Most of the time goes into waiting for memory, so what is needed of all of them is
// asked for in one turn before the next, which follows where that points to.
constexpr Py_ssize_t TOGETHER = 16;

void fetch(const void* place) { __builtin_prefetch(place); }

void fetch_tensor(const c10::TensorImpl* impl) {
  for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) fetch(reinterpret_cast<const char*>(impl) + line);
}

void fetch_storage(const c10::TensorImpl* impl) {
  if (impl->has_storage()) fetch(impl->unsafe_storage().unsafeGetStorageImpl());
}

// An int64 array that belongs to Python.
struct Array {
  explicit Array(PyObject* object) {
    if (PyObject_GetBuffer(object, &buffer, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS)) throw python_error();
  }
  ~Array() { PyBuffer_Release(&buffer); }
  int64_t* data() const { return static_cast<int64_t*>(buffer.buf); }
  Py_ssize_t size() const { return buffer.len / static_cast<Py_ssize_t>(sizeof(int64_t)); }
  Py_buffer buffer{};
};

const at::Tensor& tensor(PyObject* list, Py_ssize_t i) {
  PyObject* item = PyList_GET_ITEM(list, i);
  TORCH_CHECK_TYPE(THPVariable_Check(item), "expected lists of tensors");
  return THPVariable_Unpack(item);
}

// look(params, states, addresses [2 + n_states, n], kinds [2, n]): the rows are parameters, gradients and states.
PyObject* look_at(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(n_args == 4 && PyList_Check(args[0]) && PyList_Check(args[1]), "expected (list, list, array, array)");
  PyObject *params = args[0], *states = args[1];
  const Array addresses(args[2]), kinds(args[3]);
  const Py_ssize_t n = PyList_GET_SIZE(params), n_states = PyList_GET_SIZE(states);
  TORCH_CHECK_TYPE(addresses.size() == (2 + n_states) * n && kinds.size() == 2 * n, "arrays of another size");
  int of_params = SAME, of_grads = SAME, of_states = SAME;
  const at::Tensor *ps[TOGETHER], *grads[TOGETHER];
  for (Py_ssize_t start = 0; start < n; start += TOGETHER) {
    const Py_ssize_t m = std::min(TOGETHER, n - start), next = std::min(TOGETHER, n - start - m);
    for (Py_ssize_t i = 0; i < next; i++) fetch(PyList_GET_ITEM(params, start + m + i));
    for (Py_ssize_t i = 0; i < m; i++) fetch_tensor((ps[i] = &tensor(params, start + i))->unsafeGetTensorImpl());
    for (Py_ssize_t i = 0; i < m; i++) {
      fetch(ps[i]->unsafeGetTensorImpl()->autograd_meta());
      fetch_storage(ps[i]->unsafeGetTensorImpl());
    }
    for (Py_ssize_t i = 0; i < m; i++) fetch_tensor((grads[i] = &grad_of(*ps[i]))->unsafeGetTensorImpl());
    for (Py_ssize_t i = 0; i < m; i++) fetch_storage(grads[i]->unsafeGetTensorImpl());
    int64_t *address = addresses.data() + start, *kind = kinds.data() + start;
    for (Py_ssize_t i = 0; i < m; i++) {
      of_params = std::max<int>(of_params, look(*ps[i], address[i], kind[i]));
      of_grads = std::max<int>(of_grads, look(*grads[i], address[n + i], kind[n + i]));
    }
  }
  for (Py_ssize_t k = 0; k < n_states; k++) {
    PyObject* state = PyList_GET_ITEM(states, k);
    TORCH_CHECK_TYPE(PyList_Check(state) && PyList_GET_SIZE(state) == n, "a state needs a tensor for each parameter");
    int64_t* known = addresses.data() + (2 + k) * n;
    for (Py_ssize_t i = 0; i < n; i++) {
      const auto now = reinterpret_cast<int64_t>(tensor(state, i).const_data_ptr());
      if (known[i] != now) of_states = MOVED;
      known[i] = now;
    }
  }
  return PyLong_FromLong(of_params || of_states ? OTHER : of_grads);
  END_HANDLE_TH_ERRORS
}

// Whether lists, one after the other, have the same objects as one list.
PyObject* same_members(PyObject*, PyObject* args) {
  PyObject *lists, *members;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &lists, &PyList_Type, &members)) return nullptr;
  const Py_ssize_t n = PyList_GET_SIZE(members);
  Py_ssize_t at = 0;
  const Py_ssize_t n_lists = PyList_GET_SIZE(lists);
  for (Py_ssize_t k = 0; k < n_lists; k++) {
    PyObject* list = PyList_GET_ITEM(lists, k);
    if (k + TOGETHER < n_lists) fetch(PyList_GET_ITEM(lists, k + TOGETHER));
    if (k + TOGETHER / 2 < n_lists && PyList_Check(PyList_GET_ITEM(lists, k + TOGETHER / 2)))
      fetch(reinterpret_cast<PyListObject*>(PyList_GET_ITEM(lists, k + TOGETHER / 2))->ob_item);
    if (!PyList_Check(list)) Py_RETURN_FALSE;
    const Py_ssize_t size = PyList_GET_SIZE(list);
    if (at + size > n) Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i < size; i++)
      if (PyList_GET_ITEM(list, i) != PyList_GET_ITEM(members, at++)) Py_RETURN_FALSE;
  }
  return PyBool_FromLong(at == n);
}

// Counts a change of each tensor, so that autograd notices that what it has saved is no longer there.
PyObject* count_change(PyObject*, PyObject* tensors) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyList_Check(tensors), "expected a list of tensors");
  const Py_ssize_t n = PyList_GET_SIZE(tensors);
  for (Py_ssize_t i = 0; i < n; i++) {
    const at::Tensor& x = tensor(tensors, i);
    if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"look", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(look_at)), METH_FASTCALL,
     "What is new about tensors: 0 nothing, 1 gradients lie elsewhere, 2 anything else."},
    {"count_change", count_change, METH_O, "Count a change of each tensor of a list for autograd."},
    {"same_members", same_members, METH_VARARGS, "Whether lists have, one after the other, the members of one list."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastopt_look", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_fastopt_look(void) { return PyModule_Create(&module); }
