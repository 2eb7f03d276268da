// What fastopt/engine/look.py asks of every tensor in every step, without a Python call for each.

#include <torch/csrc/autograd/python_variable.h>

namespace {

enum Found { SAME = 0, MOVED = 1, OTHER = 2 };

// What a kernel takes for granted about a tensor: its dtype, and sizes and strides; 0 for one that is not an ordinary
// strided tensor. Without gaps only the number of elements counts.
int64_t kind_of(const at::Tensor& x) {
  static constexpr auto odd = c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::Negative, c10::DispatchKey::Conjugate, c10::DispatchKey::Functionalize});
  if (!x.defined() || x.key_set().has_any(odd) || x.layout() != at::kStrided || !x.has_storage()) return 0;
  const auto dtype = static_cast<uint64_t>(x.scalar_type());
  if (x.is_contiguous()) return static_cast<int64_t>((static_cast<uint64_t>(x.numel()) << 8 | dtype) << 2 | 1);
  uint64_t digest = 1469598103934665603ull;
  auto mix = [&digest](uint64_t value) { digest = (digest ^ value) * 1099511628211ull; };
  mix(dtype);
  for (auto size : x.sizes()) mix(static_cast<uint64_t>(size));
  for (auto stride : x.strides()) mix(static_cast<uint64_t>(stride));
  return static_cast<int64_t>(digest << 2 | 3);
}

Found look(const at::Tensor& x, int64_t& address, int64_t& kind) {
  const int64_t kind_now = kind_of(x);
  const int64_t address_now = kind_now ? reinterpret_cast<int64_t>(x.const_data_ptr()) : 0;
  const Found found = !kind_now || kind_now != kind ? OTHER : address_now != address ? MOVED : SAME;
  address = address_now;
  kind = kind_now;
  return found;
}

constexpr Py_ssize_t AHEAD = 8;

// Most of the time goes into waiting for memory: ask for the tensor that comes next but a few.
void fetch(PyObject* list, Py_ssize_t i) {
  const Py_ssize_t n = PyList_GET_SIZE(list);
  if (i + 2 * AHEAD < n) __builtin_prefetch(PyList_GET_ITEM(list, i + 2 * AHEAD));
  if (i + AHEAD >= n || !THPVariable_CheckExact(PyList_GET_ITEM(list, i + AHEAD))) return;
  const auto* impl = THPVariable_Unpack(PyList_GET_ITEM(list, i + AHEAD)).unsafeGetTensorImpl();
  for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(impl) + line);
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
  for (Py_ssize_t i = 0; i < n; i++) {
    fetch(params, i);
    const at::Tensor& p = tensor(params, i);
    of_params = std::max<int>(of_params, look(p, addresses.data()[i], kinds.data()[i]));
    of_grads = std::max<int>(of_grads, look(p.grad(), addresses.data()[n + i], kinds.data()[n + i]));
  }
  for (Py_ssize_t k = 0; k < n_states; k++) {
    PyObject* state = PyList_GET_ITEM(states, k);
    TORCH_CHECK_TYPE(PyList_Check(state) && PyList_GET_SIZE(state) == n, "a state needs a tensor for each parameter");
    int64_t* known = addresses.data() + (2 + k) * n;
    for (Py_ssize_t i = 0; i < n; i++) {
      fetch(state, i);
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
  for (Py_ssize_t k = 0; k < PyList_GET_SIZE(lists); k++) {
    PyObject* list = PyList_GET_ITEM(lists, k);
    if (!PyList_Check(list)) Py_RETURN_FALSE;
    const Py_ssize_t size = PyList_GET_SIZE(list);
    if (at + size > n) Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i < size; i++)
      if (PyList_GET_ITEM(list, i) != PyList_GET_ITEM(members, at++)) Py_RETURN_FALSE;
  }
  return PyBool_FromLong(at == n);
}

PyMethodDef methods[] = {
    {"look", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(look_at)), METH_FASTCALL,
     "What is new about tensors: 0 nothing, 1 gradients lie elsewhere, 2 anything else."},
    {"same_members", same_members, METH_VARARGS, "Whether lists have, one after the other, the members of one list."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastopt_look", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_fastopt_look(void) { return PyModule_Create(&module); }
