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

// Most of the time goes into waiting for memory: ask for the tensors that come next.
void fetch_ahead(PyObject* list, Py_ssize_t i, Py_ssize_t n) {
  if (i + 16 < n) __builtin_prefetch(PyList_GET_ITEM(list, i + 16));
  if (i + 8 >= n) return;
  PyObject* item = PyList_GET_ITEM(list, i + 8);
  if (!THPVariable_CheckExact(item)) return;
  const char* impl = reinterpret_cast<const char*>(THPVariable_Unpack(item).unsafeGetTensorImpl());
  for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) __builtin_prefetch(impl + line);
}

// Calls `each(tensor, address, kind)` for the arguments (list of tensors, int64 addresses, int64 kinds).
template <typename Each>
PyObject* over(PyObject* args, Each each) {
  PyObject* list;
  Py_buffer addresses, kinds;
  if (!PyArg_ParseTuple(args, "O!w*w*", &PyList_Type, &list, &addresses, &kinds)) return nullptr;
  const Py_ssize_t n = PyList_GET_SIZE(list);
  const Py_ssize_t bytes = n * static_cast<Py_ssize_t>(sizeof(int64_t));
  int found = SAME;
  bool fine = addresses.len == bytes && kinds.len == bytes;
  auto* address = static_cast<int64_t*>(addresses.buf);
  auto* kind = static_cast<int64_t*>(kinds.buf);
  for (Py_ssize_t i = 0; fine && i < n; i++) {
    fetch_ahead(list, i, n);
    PyObject* item = PyList_GET_ITEM(list, i);
    fine = THPVariable_Check(item);
    if (fine) found = std::max<int>(found, each(THPVariable_Unpack(item), address[i], kind[i]));
  }
  PyBuffer_Release(&addresses);
  PyBuffer_Release(&kinds);
  if (!fine) {
    PyErr_SetString(PyExc_TypeError, "expected a list of tensors and an int64 for each in both tables");
    return nullptr;
  }
  return PyLong_FromLong(found);
}

PyObject* tensors(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  return over(args, look);
  END_HANDLE_TH_ERRORS
}

PyObject* gradients(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  return over(args, [](const at::Tensor& p, int64_t& address, int64_t& kind) { return look(p.grad(), address, kind); });
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
    {"tensors", tensors, METH_VARARGS, "What is new about the tensors of a list: 0 nothing, 1 moved, 2 another kind."},
    {"gradients", gradients, METH_VARARGS, "The same for the gradients of a list of tensors."},
    {"same_members", same_members, METH_VARARGS, "Whether lists have, one after the other, the members of one list."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "fastopt_look", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_fastopt_look(void) { return PyModule_Create(&module); }
