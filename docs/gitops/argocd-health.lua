-- Health of a DisaggregatedModel for Argo CD: Healthy when Ready is about the generation that is wanted, Degraded when it stalls.
local health = { status = "Progressing", message = "waiting for the operator" }
if obj.status == nil or obj.status.conditions == nil then
  return health
end

-- What is said of an older generation says nothing of this one.
if obj.status.observedGeneration ~= obj.metadata.generation then
  health.message = "waiting for the operator to see generation " .. tostring(obj.metadata.generation)
  return health
end

local ready = nil
for _, condition in ipairs(obj.status.conditions) do
  local text = (condition.reason or "") .. ": " .. (condition.message or "")
  if condition.type == "Stalled" and condition.status == "True" then
    return { status = "Degraded", message = text }
  end
  if condition.type == "Ready" then
    ready = { status = condition.status, text = text }
  end
end

if ready ~= nil then
  health.message = ready.text
  if ready.status == "True" then
    health.status = "Healthy"
  end
end
return health
