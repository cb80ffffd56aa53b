-- The contract is as before, but for a budget that stands as it should, with an operator's limit or the very limit of the entry,
-- and has no room for the entry: it is left alone and not locked, for every call asks of it, and none may wait for another to be
-- refused. One that has room is locked, so that no other limit comes between this and the reservation.
CREATE OR REPLACE FUNCTION engine_open_budget_v2(p_tenant uuid, p_entry jsonb, p_starts timestamptz) RETURNS void
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    INSERT INTO budgets (tenant_id, scope_kind, scope_id, unit, period, starts_at, subject, limit_amount, pinned)
        SELECT p_tenant, p_entry ->> 'scope_kind', (p_entry ->> 'scope_id')::uuid, p_entry ->> 'unit',
               COALESCE(p_entry ->> 'period', 'total'), p_starts, p_entry ->> 'subject',
               COALESCE(set.limit_amount, (p_entry ->> 'limit')::numeric), set.limit_amount IS NOT NULL
        FROM (SELECT 1) AS one LEFT JOIN LATERAL (
            SELECT limit_amount FROM budgets
            WHERE tenant_id = p_tenant AND scope_kind = p_entry ->> 'scope_kind'
              AND scope_id = (p_entry ->> 'scope_id')::uuid AND unit = p_entry ->> 'unit'
              AND period = COALESCE(p_entry ->> 'period', 'total') AND pinned
            ORDER BY starts_at < p_starts DESC, starts_at DESC LIMIT 1) AS set ON true
        WHERE NOT EXISTS (
            SELECT FROM budgets
            WHERE tenant_id = p_tenant AND scope_kind = p_entry ->> 'scope_kind'
              AND scope_id = (p_entry ->> 'scope_id')::uuid AND unit = p_entry ->> 'unit'
              AND period = COALESCE(p_entry ->> 'period', 'total') AND starts_at = p_starts
              AND (pinned OR limit_amount = (p_entry ->> 'limit')::numeric)
              AND spent + reserved + (p_entry ->> 'amount')::numeric > limit_amount)
        ON CONFLICT (tenant_id, scope_kind, scope_id, unit, period, starts_at)
            DO UPDATE SET limit_amount = EXCLUDED.limit_amount, pinned = EXCLUDED.pinned WHERE NOT budgets.pinned
$$;
